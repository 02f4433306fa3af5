"""The small process that must not die: owns Redis, the controller and the role steps; signals, requeue."""
