"""`catversion study`: CatVersion against its rivals, its ablation, and several concepts in one prompt."""
