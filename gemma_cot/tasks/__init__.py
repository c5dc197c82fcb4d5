"""The embedded default: synthetic word problems, and the script that makes the tiny model.

arithmetic (a step, in the head or worked out) -> families (questions) -> dataset (rows) ->
pretrain (tokenizer, corpus, weights). The core never imports this room.
"""
