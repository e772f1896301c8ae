"""How far an explanation can be trusted: measures with their controls, claims, calibration."""
