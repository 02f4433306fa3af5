"""The brain inside the job: says what runs, hands out prompts, decides to save, evaluate and stop.

One process, one thread, no torch. It reads `inbox("controller")`, keeps all state of a run that is not
weights or optimizer, and saves that state with each checkpoint. It imports no other role: policy,
rollout and supervisor meet it on the bus only.
"""
