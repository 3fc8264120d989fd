"""Clients of the Triton server, blocking and asyncio, over gRPC, HTTP and shared memory."""
