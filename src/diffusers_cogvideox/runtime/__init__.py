"""What can be done to loaded models while they run; knows models, not pipelines."""
