"""Studies: CatVersion against its baselines, its ablation, several concepts in one prompt, and a user's sweeps."""
