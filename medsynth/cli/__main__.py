"""``python -m medsynth.cli``, as ``torchrun`` starts it."""

from medsynth.cli.verbs import main

if __name__ == "__main__":
    main()
