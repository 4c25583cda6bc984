"""The ops: public function, torch op, fake kernel and autograd, one module each; and what these modules share."""
