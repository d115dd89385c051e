"""Where training runs: trials and their workers, Ray Tune, the machines. The only room that imports ray."""
