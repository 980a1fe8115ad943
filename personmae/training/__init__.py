"""What a training run needs besides its model and data: processes, checkpoints, the logbook, collapse monitors, optimisers and schedules."""
