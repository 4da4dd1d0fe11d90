"""`catversion study`: the paper's two tables, CatVersion against its rivals and its ablation, on the mini model."""
