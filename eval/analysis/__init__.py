"""From the samples of one system and task to its scores, calibration and their uncertainty."""
