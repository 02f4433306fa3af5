"""hpc-rl: describe a post-training run once; Slurm runs it; nothing is lost."""

__version__ = "0.1.0"
