"""``sse-server doctor``: what is wrong with a service that is deployed, from outside and from its
database."""
