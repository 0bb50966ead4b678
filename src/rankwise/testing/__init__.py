"""The conformance suites: what every metric and every allocator must obey, for those in the package and for yours."""
