"""The groups that serve models to the rollouts: rewards that a model gives, and a distillation's teacher."""
