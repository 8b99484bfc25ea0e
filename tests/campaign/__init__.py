"""Campaigns: what may happen to a run, done to it many times over, each time with the result that an easy life has."""
