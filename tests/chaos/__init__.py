"""What the service does while Couchbase fails: the real service, the real SDK, and the emulator's faults."""
