"""A discrete-event simulation of a fleet, calibrated by measured times: what `sun plan` and the figures of growth are made from."""
