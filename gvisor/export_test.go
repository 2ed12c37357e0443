package gvisor

// Inject calls inject before each request to the host, which what names; its error is then the result of that request.
func (r *Runtime) Inject(inject func(what string) error) { r.inject = inject }
