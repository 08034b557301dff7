"""What the command line makes of its options: which model, which task, which files, and the videos themselves."""
