# SPDX-License-Identifier: Apache-2.0
"""Modules that answer to the names and signatures of SGLang, vLLM and FlashInfer.

Nothing is repacked per call and nothing is cached by address: weights are read where they lie.
"""
