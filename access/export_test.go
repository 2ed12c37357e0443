package access

// Waiting is how many wait.
func (a *Accounts) Waiting() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.waiting)
}
