"""Weight files of other layouts, as names and tensors: reversible key rules, safe reading, and LoRA."""
