"""The command line; nothing heavy is imported before a verb runs, so that ``medsynth --help`` answers at once."""
