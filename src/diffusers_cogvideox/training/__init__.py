"""Training: objectives, tasks and the loop; `cogvideox train CONFIG.yaml`."""
