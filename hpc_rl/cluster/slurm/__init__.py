"""Everything that talks to Slurm: rendering, submission, job steps, states, and a draft of a site profile."""
