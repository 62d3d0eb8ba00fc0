"""Measure a training step of fxpass beside the ways people train in mixed precision today."""
