"""The report as one self-contained HTML page: what was measured, and how to read it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from medsynth.release.spending import round_up

NAMES = {
    "real_only": "real only",
    "synthetic_only": "synthetic only",
    "mixed": "real + synthetic",
    "reconstructed": "real, through the codec",
}
_NOT_LEARNT = 0.1  # skill below which Dice says nothing about images
_COPY_RATIO, _COPY_SHARE = 0.7, 0.25  # nearness that asks for a look at the pictures
_WEAK_AGREEMENT = 0.7  # of the Dice on real patients
_FIGURES = (
    ("montage.png", "Real and synthetic", "Held-out patients above, synthetic pairs below, with label contours."),
    (
        "dice.png",
        "Dice on real patients",
        "Mean and 95 % bootstrap interval over patients; dashed: a constant mean shape.",
    ),
    ("memorisation.png", "Nearest training image", "Synthetic images should be no nearer than other patients are."),
    ("label_maps.png", "Label maps", "What synthetic label maps and those of held-out patients measure."),
    (
        "roc.png",
        "Membership attack on the generator",
        "How many training patients an attacker recognises at how many false alarms; on the diagonal he only guesses.",
    ),
    ("losses.png", "Training of the segmentation models", "Smoothed loss; a flat line is a failed training."),
)
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>medsynth: $title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body{font:16px/1.55 system-ui,sans-serif;color:#1d2430;background:#f5f6f8;margin:0}
main{max-width:1280px;margin:0 auto;padding:32px 24px 64px}p,ul,.cards,figure{max-width:960px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 8px}
.internal{display:inline-block;background:#9b2226;color:#fff;border-radius:4px;padding:2px 10px;font-size:13px}
.sub{color:#5a6372;margin:6px 0 20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;margin:20px 0}
.card{background:#fff;border:1px solid #dde1e7;border-radius:8px;padding:14px 16px}
.card b{display:block;font-size:25px;line-height:1.2}.card span{color:#5a6372;font-size:13px}
ul{padding-left:20px}li{margin:7px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;background:#fff;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:7px 9px;border-bottom:1px solid #e6e9ee}th{font-size:13px;color:#5a6372}
td small{color:#5a6372;display:block;white-space:nowrap}td{vertical-align:top}
.audits td small{white-space:normal}.pass{color:#2a7d4f}.unsure{color:#9a6b00}.fail{color:#9b2226;font-weight:700}
figure{background:#fff;border:1px solid #dde1e7;border-radius:8px;margin:0;padding:14px}
figure img{max-width:100%;display:block;margin:0 auto}figcaption{color:#5a6372;font-size:14px;margin-top:8px}
</style></head><body><main>
<h1>$title</h1><span class="internal">INTERNAL: computed on patients, stays inside the hospital</span>
<p class="sub">$subtitle</p>
$body
</main></body></html>
""")
_BODY = Template("""<div class="cards">$cards</div>
<h2>How to read it</h2><ul>$reading</ul>
<h2>Dice by training set</h2><div class="scroll">$dice</div>
$audits
$figures
<h2>Other measurements</h2><div class="scroll">$others</div>""")


def write_page(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.html``; pictures are embedded, nothing is fetched.

    Args:
        report: what ``report.json`` holds.
        folder: where the figures lie and the page goes.
    """
    patients = next(iter(report["dice"].values()))["n_patients"]
    subtitle = (
        f"{patients} held-out patients, {report['n_train_patients']} train patients, {report['n_pairs']} synthetic "
        "pairs; the unit of every interval is the patient."
    )
    body = _BODY.substitute(
        cards="".join(_cards(report)),
        reading="".join(f"<li>{escape(line)}</li>" for line in reading(report)),
        dice=_dice_table(report),
        audits=_audits(report.get("audits", [])),
        figures="".join(figure(folder / name, title, text) for name, title, text in _FIGURES),
        others=_others(report),
    )
    (folder / "report.html").write_text(page(str(report["study"]), subtitle, body), encoding="utf-8")


def page(title: str, subtitle: str, body: str) -> str:
    """Return one self-contained internal page.

    Args:
        title: plain text.
        subtitle: plain text.
        body: HTML.
    """
    return _PAGE.substitute(title=escape(title), subtitle=escape(subtitle), body=body)


def reading(report: Mapping[str, Any]) -> list[str]:
    """Return what the numbers mean, in plain sentences."""
    lines = [*_read_dice(report), *_read_agreement(report), *_read_label_maps(report["label_maps"])]
    lines += _read_empty(report)
    lines.append(_read_memorisation(report["memorisation"]))
    if report["epsilon"] == "inf":
        lines.append("Training was not private: nothing of this study can be certified.")
    else:
        attack, spent = report["attack"], round_up(report["epsilon"])
        lines.append(
            f"Privacy: epsilon {spent:.3f} at delta {report['delta']:g} for a whole patient. Whoever "
            f"accepts {attack['false_positive_rate']:.0%} false alarms recognises a patient as a member with a chance "
            f"of at most {attack['true_positive_rate_at_most']:.1%}, whatever the method."
        )
    return lines


def _read_dice(report: Mapping[str, Any]) -> list[str]:
    dice, floor = report["dice"], report["floor"]["mean"]
    lines = []
    block = dice.get("synthetic_only")
    if block and "synthetic_only" in report["relative_to_real"]:
        share = report["relative_to_real"]["synthetic_only"]
        lines.append(
            f"A segmentation model trained on synthetic pairs alone reaches a Dice of {number(block['mean'])} on "
            f"real patients that no stage has seen: {share:.0%} of the {number(dice['real_only']['mean'])} from real "
            "training data."
        )
    if block and block.get("skill") is not None:
        learnt = (
            "next to nothing was learnt from the synthetic images; their Dice comes from the shape alone."
            if block["skill"] < _NOT_LEARNT
            else f"of what real images teach beyond that, the synthetic ones teach {block['skill']:.0%} (the skill)."
        )
        lines.append(f"One constant mean shape, without a look at any image, reaches {number(floor)}: {learnt}")
    elif block and "real_only" not in dice:
        lines.append(
            f"A segmentation model trained on synthetic pairs alone reaches a Dice of {number(block['mean'])} on "
            f"real patients that no stage has seen; one constant mean shape reaches {number(floor)}. How much of what "
            "real training data teach that is, only the regime real_only tells (segment.regimes)."
        )
    elif block:
        lines.append(
            f"One constant mean shape reaches {number(floor)} and real training data does not beat it: "
            "the segmentation models are too weak to judge the synthetic pairs, alone or added to real ones (more "
            "segment.steps)."
        )
        return lines
    return lines + _read_mixed(dice)


def _read_mixed(dice: Mapping[str, Any]) -> list[str]:
    if not {"mixed", "real_only"} <= set(dice):
        return []
    mixed, real = dice["mixed"], dice["real_only"]
    gain = mixed["mean"] - real["mean"]
    low, high = real["ci95"]
    inside = low <= mixed["mean"] <= high
    effect = "no clear effect" if inside else ("a gain" if gain > 0 else "a loss")
    return [f"Adding synthetic pairs to real training data changes the Dice by {gain:+.3f}: {effect}."]


def _read_empty(report: Mapping[str, Any]) -> list[str]:
    count = report.get("n_empty", 0)
    return [f"{count} of the {report['n_pairs']} synthetic label maps are empty."] if count else []


def _read_agreement(report: Mapping[str, Any]) -> list[str]:
    agreement, labellers = report["agreement"], report.get("labellers", 0)
    if not agreement or agreement["mean"] is None:
        return []
    real = report["dice"]["real_only"]["mean"]
    asked, lines = "the label maps in the synthetic images", []
    if labellers:
        asked = "the label maps that the synthetic images were drawn for"
        lines = [
            f"Label maps of the pairs are what networks trained on the same patients see in the images ({labellers} of "
            "them together), not what the images were drawn for."
        ]
    if report["dice"]["real_only"].get("skill") is None:
        # A model that looks at no image finds an ordinary label map in noise, too.
        return [
            *lines,
            f"The model trained on real patients finds {asked} with a Dice of "
            f"{number(agreement['mean'])}, which says nothing of the images: it does not beat one constant mean shape.",
        ]
    verdict = (
        "images obey their label maps"
        if agreement["mean"] >= _WEAK_AGREEMENT * real
        else "images do not obey their label maps well"
    )
    return [
        *lines,
        f"A model trained on real patients finds {asked} with a Dice of "
        f"{number(agreement['mean'])} ({number(real)} in real images): {verdict}.",
    ]


def _read_label_maps(found: Mapping[str, Any]) -> list[str]:
    drawn, yardstick = found["plausible"]["synthetic"], found["plausible"]["train"]
    if drawn is None or yardstick is None:
        return []
    return [
        f"{drawn:.0%} of the synthetic label maps lie in the range of the held-out patients in volume, surface, parts "
        f"and neighbours of every label; so do {yardstick:.0%} of the train patients' own."
    ]


def _read_memorisation(near: Mapping[str, Any]) -> str:
    ratio, share = near["median_ratio"], near["nearer_than_held_out_p5"]
    suspicious = ratio < _COPY_RATIO or share > _COPY_SHARE
    verdict = "nearer than strangers are: look at the pictures for copies" if suspicious else "no sign of copies"
    return (
        f"The nearest training image of a synthetic one is {ratio:.2f} times as far as that of a held-out patient "
        f"({share:.0%} are nearer than the nearest 5 % of patients): {verdict}. This is sanity, not privacy."
    )


def _cards(report: Mapping[str, Any]) -> list[str]:
    dice = report["dice"]
    values = [(number(dice[name]["mean"]), f"Dice, {NAMES[name]}") for name in NAMES if name in dice]
    values.append((number(report["floor"]["mean"]), "Dice of a constant mean shape"))
    epsilon = "none" if report["epsilon"] == "inf" else f"ε {round_up(report['epsilon']):.3f}"
    values.append((epsilon, f"privacy per patient, δ {report['delta']:g}"))
    return [f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in values]


def _dice_table(report: Mapping[str, Any]) -> str:
    labels = list(report["floor"]["per_label"])
    rows = [_dice_row(NAMES[name], block, labels) for name, block in report["dice"].items()]
    rows.append(_dice_row("constant mean shape (floor)", report["floor"], labels))
    return table(["trained on", "Dice", *labels, "skill", "by seed"], rows)


def _dice_row(name: str, block: Mapping[str, Any], labels: list[str]) -> list[str]:
    parts = [block, *(block["per_label"][label] for label in labels)]
    cells = [
        f"{number(one['mean'])} <small>({number(one['ci95'][0])} to {number(one['ci95'][1])})</small>" for one in parts
    ]
    seeds = ", ".join(number(value) for value in block.get("seeds", {}).values())
    return [escape(name), *cells, number(block.get("skill"), 2), seeds or "-"]


def _others(report: Mapping[str, Any]) -> str:
    fidelity, codec = report["fidelity"], report["reconstruction"]
    rows = [
        [
            "Discrepancy of the image crowds (MMD²)",
            number(fidelity["mmd_synthetic"], 4),
            f"{number(fidelity['mmd_held_out'], 4)} for held-out patients",
        ],
        [
            "Similarity among images (SSIM)",
            number(fidelity["ssim_within_synthetic"]),
            f"{number(fidelity['ssim_within_real'])} among real ones; higher means less variety",
        ],
        [
            "Latent codec on patients, PSNR",
            f"{codec['psnr_db']:.1f} dB",
            f"SSIM {codec['ssim']:.3f}, mean error {codec['mae']:.4f} of a range of 2",
        ],
    ]
    if codec["dice"]:
        seen, real = (number(codec["dice"][name]) for name in ("reconstructions", "originals"))
        rows.append(["Dice of real-trained models on patients passed through the codec", seen, f"{real} on originals"])
    for name, label in report["label_maps"]["labels"].items():
        sizes = label["measures"]["volume"]
        drawn, real = (number(sizes.get(crowd, {}).get("p50"), 0) for crowd in ("synthetic", "real"))
        title = report["label_maps"]["titles"]["volume"]
        rows.append([f"Median {escape(title)} of {escape(name)}", drawn, f"{real} in held-out patients"])
    return table(["measurement", "synthetic", "yardstick"], rows)


def _audits(findings: list[Mapping[str, Any]]) -> str:
    if not findings:
        return ""
    rows = [_audit_row(finding) for finding in findings]
    head = ["audit", "measured", "interval", "allowed", "positive control", "verdict"]
    subjects: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        subjects.setdefault((str(finding["audit"]), str(finding["shows"])), []).append(str(finding["subject"]))
    items = "".join(
        f"<li><b>{escape(name)}</b> of {escape(', '.join(of))}: {escape(text)}</li>"
        for (name, text), of in subjects.items()
    )
    return (
        "<h2>Audits</h2><p>They try to make the claim false; none of them can prove it. Each ran beside a positive "
        "control, broken or leaky on purpose, that had to turn red.</p>"
        f'<div class="scroll audits">{table(head, rows)}</div>'
        f"<ul>{items}</ul>"
    )


def _audit_row(finding: Mapping[str, Any]) -> list[str]:
    value, low, high, allowed = (_figures(finding[key]) for key in ("value", "low", "high", "allowed"))
    measured = f"{value}<small>{escape(str(finding['measures']))}</small>"
    if finding["detail"]:
        measured += f"<small>{escape(str(finding['detail']))}</small>"
    interval = f"at least {low}" if finding["high"] == "inf" else ("exact" if low == high else f"{low} to {high}")
    controls = "".join(
        f"{'caught' if control['caught'] else '<b>MISSED</b>'}: {escape(str(control['name']))} "
        f"<small>{_figures(control['value'])}</small>"
        for control in finding["controls"]
    )
    verdict = str(finding["verdict"])
    colour = {"pass": "pass", "cannot say": "unsure"}.get(verdict, "fail")
    name = f"{escape(str(finding['audit']))}<small>{escape(str(finding['subject']))}</small>"
    return [name, measured, interval, allowed, controls, f'<span class="{colour}">{escape(verdict)}</span>']


def _figures(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table of cells that are HTML already."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def figure(path: Path, title: str, text: str) -> str:
    """Return a heading with an embedded picture and its caption; nothing where there is no picture."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    picture = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(title)}</h2><figure>{picture}<figcaption>{escape(text)}</figcaption></figure>"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number as text; a dash where it is unknown."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before a zero
