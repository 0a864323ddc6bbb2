# Build:  docker build -t medsynth .
# Run:    docker run --rm --network none --read-only --tmpfs /tmp -e MEDSYNTH_HOME=/runs/site \
#             -v COHORT:/data:ro -v RUNS:/runs medsynth \
#             run /opt/medsynth/configs/demo.yaml --input /data --out /runs/study
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY medsynth medsynth
RUN pip install --constraint constraints.txt .

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 medsynth
COPY --from=build /opt/venv /opt/venv
COPY configs /opt/medsynth/configs
# offline at run time: no telemetry, no model downloads, caches in the writable temporary folder
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=1 \
    HF_HUB_OFFLINE=1 \
    MPLBACKEND=Agg \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /runs
ENTRYPOINT ["medsynth"]
CMD ["--help"]
