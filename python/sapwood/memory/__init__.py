"""The Python face of the C++ cache manager: how large the pool is, which namespace a request's keys live in."""
