"""What will run: the site's schema, GPU arithmetic, parallel mesh, memory estimate."""

from hpc_rl.plan.make import make_plan, read_plan, resolve_recipe, write_plan
from hpc_rl.plan.schema import Group, Mesh, Plan
from hpc_rl.plan.site import Site

__all__ = ["Group", "Mesh", "Plan", "Site", "make_plan", "read_plan", "resolve_recipe", "write_plan"]
