package tracefs

// rounds is how often [Instance.ArmAll] asks for threads again at most: one more for each time that a process is
// faster, which few are twice.
const rounds = 8

// ArmAll is [Instance.Arm] for the threads that list returns, for example those of [Family]. Threads that appear while
// it does so are asked for again and named too, which takes tens of milliseconds; those made later the kernel follows by
// itself. The first arming on a machine that records nothing takes one to two milliseconds, others a fifth of that. On an
// error the instance may be armed; [Instance.Disarm] puts an end to that.
func (i *Instance) ArmAll(list func() ([]int, error)) error {
	threads, err := list()
	if err != nil {
		return err
	}
	if err := i.Arm(threads...); err != nil {
		return err
	}
	for range rounds {
		now, err := list()
		if err != nil {
			return err
		}
		late := newcomers(threads, now)
		if len(late) == 0 {
			return nil
		}
		if err := i.Add(late...); err != nil {
			return err
		}
		threads = now
	}
	return nil
}

// newcomers returns what now has and before has not: either may be a hundred thousand threads.
func newcomers(before, now []int) []int {
	known := make(map[int]struct{}, len(before))
	for _, t := range before {
		known[t] = struct{}{}
	}
	var late []int
	for _, t := range now {
		if _, ok := known[t]; !ok {
			late = append(late, t)
		}
	}
	return late
}
