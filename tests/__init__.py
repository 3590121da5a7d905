"""Tests of the service, and what they need: the emulator, the sample data, the demo."""
