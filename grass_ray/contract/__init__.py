"""What every sampler and every method must do, as checks that anybody can call (``grass-ray check-method``)."""
