"""The ops, one room each: public function, torch op, fake kernel, autograd and reference; `common` is shared."""
