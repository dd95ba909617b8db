"""Measurements: layers and networks against float, compiled and int8; memory; where the time goes."""
