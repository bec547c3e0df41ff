"""Foundations that know no Ray and no stage: errors, seeds, settings, files, artifacts, schemas, locks, trust."""
