"""Audits: they can falsify a claim, never prove one. One file an audit, each with a positive control."""
