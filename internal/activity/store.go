package activity

// Actions of what happens to the log itself. They stand in the account of whoever
// runs the server.
const (
	DayDelete      = "activity.day.delete"      // a whole day was dropped
	ReserveRelease = "activity.reserve.release" // the space that was held back was freed
	StoreRestore   = "activity.store.restore"   // a file that was removed was put back
	StoreUpdate    = "activity.store.update"    // the store takes writes again, or none any more, or has little space
)
