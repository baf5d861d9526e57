"""SUN on Triton, the library: prefill, handoff, shared decode and routing. Imports no Triton, so all of it runs and is tested without one."""
