"""`catversion study`: CatVersion against its baselines, its ablation, and several concepts in one prompt."""
