"""Where training runs: Ray Train worker, Ray Tune sweep, plans, progress. The only room that imports ray."""
