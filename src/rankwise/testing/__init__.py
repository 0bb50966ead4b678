"""The conformance suites hold the laws that every metric, form and allocator obeys, ours and yours."""
