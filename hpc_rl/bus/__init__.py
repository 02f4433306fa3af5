"""The bus: typed messages over the run's own Redis. The only room that knows Redis. No torch."""
