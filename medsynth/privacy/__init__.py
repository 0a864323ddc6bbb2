"""Everything the certificate rests on."""
