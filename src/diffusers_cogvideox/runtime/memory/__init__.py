"""How much memory a video takes, how a pipeline fits itself into what there is, and what it took in fact."""
