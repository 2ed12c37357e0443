package access

// Waiting returns how many calls wait.
func (a *Accounts) Waiting() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.waiting)
}
