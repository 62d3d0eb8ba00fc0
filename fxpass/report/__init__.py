"""The HTML report: one file, no network."""

from .build import build as build
