"""Comparisons with torch, transformers and peft (a package, so that file names may repeat)."""
