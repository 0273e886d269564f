"""Offers our OPT to SGLang's registry."""

from orchestrator.opt_native import OPTForCausalLM

EntryClass = OPTForCausalLM
