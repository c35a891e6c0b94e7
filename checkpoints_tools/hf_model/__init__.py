"""The modelling files of an exported folder: torch and transformers only, so that the folder needs nothing of ours."""
