"""The models that SGLang takes from us, as SGLANG_EXTERNAL_MODEL_PACKAGE wants them.

SGLang imports every module of the package that the variable names and registers its EntryClass,
over its own class of that name. So this package holds the models and nothing else.
"""
