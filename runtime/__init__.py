"""How a run runs: processes, checkpoints, signals, logs, speed, random numbers, files."""
